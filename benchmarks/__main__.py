"""`python -m benchmarks NAME [options]`: run one benchmark; without a name, list them."""

import ast
import importlib
import sys
from pathlib import Path


def main() -> None:
    """Dispatch to a benchmark's `main(arguments)`."""
    here = Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.py") if not path.stem.startswith("_"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        for name in names:
            words = ast.get_docstring(ast.parse((here / f"{name}.py").read_text(encoding="utf-8"))) or ""
            print(f"{name:<20}{words.partition(chr(10))[0]}")
        raise SystemExit(0 if len(sys.argv) < 2 else 2)
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
