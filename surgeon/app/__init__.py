"""The command line: one function per command, tables, benchmarks and the demo."""
