"""Every metric of the stack: one catalogue, and the registries made from it."""
