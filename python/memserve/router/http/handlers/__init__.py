"""What answers each HTTP endpoint."""
