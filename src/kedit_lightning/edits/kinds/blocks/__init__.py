"""Low-rank blocks, of which each row gets the one whose cluster its prompt falls into (MELO)."""
