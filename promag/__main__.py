"""`python -m promag COMMAND` is `promag COMMAND`."""

from promag.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
