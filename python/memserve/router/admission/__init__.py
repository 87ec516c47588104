"""The request queue, rate limits and the byte budget."""
