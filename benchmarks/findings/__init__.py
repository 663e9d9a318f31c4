"""Studies of what teaches a student, one file a finding."""
