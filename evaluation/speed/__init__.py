"""How fast everything is: one benchmark of several suites, beside published architectures and the machine's own limits."""
