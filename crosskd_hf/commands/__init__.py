"""The commands of `crosskd`, a file each."""
