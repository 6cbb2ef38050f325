"""`python -m moe` is the command `moe`; ranks are started this way."""

from moe.cli import main

if __name__ == "__main__":
    main()
