"""What may be typed: ranges, files, refusals and the options that several commands share; imports no torch."""
