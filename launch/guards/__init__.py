"""What lets a run go on by itself: bad samples are left out, loss spikes are noticed."""
