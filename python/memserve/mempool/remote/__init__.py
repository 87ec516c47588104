"""How memory pools of different processes exchange blocks: control messages over ZMQ, bytes one-sidedly."""
