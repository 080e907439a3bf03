"""Clients of other libraries: each file imports the library it is for."""
