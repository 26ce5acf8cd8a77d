"""detrcli: detection transformers from the command line and from Python."""
