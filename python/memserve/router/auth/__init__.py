"""Keys, tenants, certificates."""
