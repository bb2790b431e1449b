"""How a command line becomes options: the parser, the YAML file, TRL's names."""
