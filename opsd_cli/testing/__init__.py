"""Fault injection for tests; nothing imports it unless it is switched on."""
