"""The bundle on disk, as frozen records: what the compiler writes and the runtime reads; what both must agree on."""
