"""What stands between a connection and the application: limits of time and number, host, origin, password, bodies."""
