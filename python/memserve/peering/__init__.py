"""One endpoint per process for its exchange of memory with others: control messages, handshake, sessions."""
