"""Published systems, one file each: config, assembly, objective, weight map."""
