"""The version of the package, where every part of it may read it."""

VERSION = "0.1.0"
