"""`python -m limbeck`, which is also how torchrun starts it: `torchrun --nproc-per-node 2 -m limbeck run recipe.yaml`."""

from limbeck.cli import main

if __name__ == "__main__":
    main()
