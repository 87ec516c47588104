"""What instances report of their caches: the router's tree follows."""
