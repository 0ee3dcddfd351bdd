"""The bundle on disk, as frozen records: what the compiler writes and the runtime reads, and what both must agree on."""
