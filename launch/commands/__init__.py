"""Commands of `tim`, grouped by topic."""
