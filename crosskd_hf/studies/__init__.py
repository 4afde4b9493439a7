"""What models, data and runs are like: reports and comparisons."""
