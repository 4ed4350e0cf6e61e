"""The adapters that ship, each written as a stranger would write one and loaded through the entry-point group."""
