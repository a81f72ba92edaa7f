"""Users, ads, events and impressions in Redis."""
