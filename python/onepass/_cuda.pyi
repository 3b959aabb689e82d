from typing import Any

__version__: str
backend: Any
