"""Units of bytes: binary ones for sizes, GB for speeds."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 1e9
