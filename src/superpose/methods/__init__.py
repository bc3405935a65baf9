"""Merge methods, one file each: a dataclass of options and one function.

Importing the package imports every module in it, so a new method is there by having a file.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
