"""The paper's whole study as a program on top of the library."""
