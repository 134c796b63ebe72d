"""Images and labels: sources, readers, order, crops and views."""
