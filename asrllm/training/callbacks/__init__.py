"""What happens beside the loop, a hook a file."""
