"""`python -m promag COMMAND` is `promag COMMAND`."""

from promag.cli import main

raise SystemExit(main())
