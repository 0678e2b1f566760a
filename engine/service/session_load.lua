-- A session as it is. KEYS[1]: a hash as session_save.lua writes it. Replies {1, version, data, seconds, microseconds}.
local now = redis.call('TIME')
local held = redis.call('HMGET', KEYS[1], 'v', 'd')
return {1, held[1] or '0', held[2] or '', now[1], now[2]}
