"""What every room uses and what uses none: errors, files, command lines, processes, devices."""
