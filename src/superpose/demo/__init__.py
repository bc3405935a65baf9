"""The whole job on real data: fine-tune a real encoder on four tasks, merge it by every method, compare.

    result = superpose.demo.run_demo()
    for cells in table_rows(result): ...

Everything comes from the package registry and is kept under the cache folder, so that a second run only
merges and scores. Importing this package imports neither torch nor transformers.
"""

from superpose.demo.result import DemoResult, Row, table_rows
from superpose.demo.run import run_demo

__all__ = ["DemoResult", "Row", "run_demo", "table_rows"]
