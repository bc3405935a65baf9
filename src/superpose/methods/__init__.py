"""Merge methods, one file each: a dataclass of options and one function.

Importing the package imports every module in it, so a new method is there by having a file. After them come plug-ins:
files of the same form elsewhere (see `superpose.plug_ins`).
"""

from importlib import import_module
from pkgutil import iter_modules

from superpose.plug_ins import load_plug_ins

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

load_plug_ins()
