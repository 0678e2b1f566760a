"""Pure decision makers. Reading order in README.md."""
