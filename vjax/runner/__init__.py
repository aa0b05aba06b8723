"""Everything that runs on the device: packed inputs, persistent rows, the step's executables and their dispatch."""
