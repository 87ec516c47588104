"""From a request's text to the token ids that the servers will see, without torch."""
