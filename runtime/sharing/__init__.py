"""The CPU's part in the decoding steps of a GPU: requests in a mailbox, answered by native threads."""
