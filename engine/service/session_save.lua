-- A session's compare-and-set. KEYS[1]: a hash. ARGV: expected version, new version, data, time to live (ms), id of
-- this write. Replies {saved, version, data or "", seconds, microseconds}; saved again if this very write was.
-- Fields: v version, d data, w the last writes as "id:version;".
local now = redis.call('TIME')
local held = redis.call('HMGET', KEYS[1], 'v', 'd', 'w')
local version, writes = held[1] or '0', held[3] or ''
local _, at = string.find(writes, ARGV[5] .. ':', 1, true)
if at then
  return {1, string.match(writes, '^(%d+)', at + 1), '', now[1], now[2]}
end
if version ~= ARGV[1] then
  return {0, version, held[2] or '', now[1], now[2]}
end
writes = writes .. ARGV[5] .. ':' .. ARGV[2] .. ';'
while #writes > 512 do
  writes = string.sub(writes, string.find(writes, ';', 1, true) + 1)
end
redis.call('HSET', KEYS[1], 'v', ARGV[2], 'd', ARGV[3], 'w', writes)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {1, ARGV[2], '', now[1], now[2]}
