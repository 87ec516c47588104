"""The prefill/decode handoff: the drop-in for SGLang's MooncakeTransferEngine."""
