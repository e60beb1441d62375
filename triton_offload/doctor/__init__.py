"""What stands in the way of fast transfers on this machine."""
