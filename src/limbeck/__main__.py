"""`limbeck` and `python -m limbeck`, which is also how torchrun starts it: `torchrun --nproc-per-node 2 -m limbeck run recipe.yaml`."""

import os
import signal
import sys


def main() -> None:
    """The entry point of the `limbeck` command."""
    # OpenMP threads that wait must not spin for long: beside another busy process the default makes training 20 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGTERM, _terminate)
    from limbeck.cli_generate import generate_plainly, read_words

    words = read_words(sys.argv[1:])
    if words is not None:
        sys.exit(generate_plainly(*words))
    from limbeck.cli import app

    app()


def _terminate(_number: int, _frame: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    main()
