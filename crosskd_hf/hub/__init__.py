"""What the Hub gets."""
