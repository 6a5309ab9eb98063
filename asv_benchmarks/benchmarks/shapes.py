"""The package's table of shapes, that of this checkout whatever version is measured."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[2] / "nbdelta" / "shapes.py"
_spec = importlib.util.spec_from_file_location("nbdelta_shapes", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

Shape, PREFILL, DECODE = _module.Shape, _module.PREFILL, _module.DECODE
