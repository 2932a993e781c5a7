"""`tim bench`: measurements, alone and beside other tools."""
