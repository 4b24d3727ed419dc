"""What is said of rows: the verdict, the terminal's lines, tables and pictures; no row depends on it."""
