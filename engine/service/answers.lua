-- Exact answers that gateways share. All keys are in one hash slot. KEYS[1]: ticks, the last moment given out (us);
-- KEYS[2]: words, a sorted set of what was called off, by when; KEYS[3]: of "invalidate" the tags' versions, else the
-- entry, a hash: v value, i answer id, g tags, t tenant, s when its computation began, l lease, u when that ends.
-- A moment is the server's clock in us, and never one that was given out before: so a lease's token is the moment when
-- its computation began, and two leases never have the same.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
if now <= last then now = last + 1 end
local what, keep_ms = ARGV[1], ARGV[2]
local stamp = string.format('%.0f', now)
redis.call('SET', KEYS[1], stamp, 'PX', 86400000)

local function word(tenant, tag, id) return #tenant .. ',' .. tenant .. #tag .. ',' .. tag .. id end

local function called_off(since, tenant, tags, id)
  for _, who in ipairs(tenant == '' and {''} or {'', tenant}) do
    for n = 0, #tags do
      for _, which in ipairs(id == '' and {''} or {'', id}) do
        local at = redis.call('ZSCORE', KEYS[2], word(who, tags[n] or '', which))
        if at and tonumber(at) > since then return true end
      end
    end
  end
  return false
end

local function tags_of(from)
  local tags = {}
  for n = from, #ARGV do tags[#tags + 1] = ARGV[n] end
  return tags
end

if what == 'invalidate' then -- tenant, tag, answer id, version
  local tenant, tag, id, version = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
  if tag ~= '' and id == '' and version > 0 then
    local field = word(tenant, tag, '')
    if version <= tonumber(redis.call('HGET', KEYS[3], field) or '0') then return {'known'} end
    redis.call('HSET', KEYS[3], field, ARGV[6])
    redis.call('PEXPIRE', KEYS[3], 86400000)
  end
  redis.call('ZADD', KEYS[2], stamp, word(tenant, tag, id))
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - 2000 * tonumber(keep_ms)))
  redis.call('PEXPIRE', KEYS[2], 2 * tonumber(keep_ms))
  return {'done'}
end

local entry = redis.call('HMGET', KEYS[3], 'v', 'i', 'g', 's', 'l', 'u', 't')
if what == 'lookup' then -- lease in ms
  if entry[1] then
    if not called_off(tonumber(entry[4]), entry[7], cjson.decode(entry[3]), entry[2]) then
      return {'hit', entry[1], entry[2]}
    end
    redis.call('HDEL', KEYS[3], 'v', 'i', 'g', 's', 't')
  end
  if entry[5] and tonumber(entry[6]) > now then
    return {'wait', string.format('%.0f', tonumber(entry[6]) - now)}
  end
  local lease_ms = tonumber(ARGV[3])
  redis.call('HSET', KEYS[3], 'l', stamp, 'u', string.format('%.0f', now + lease_ms * 1000))
  redis.call('PEXPIRE', KEYS[3], lease_ms)
  return {'lease', stamp}
end
if entry[5] ~= ARGV[3] then return {'stale'} end
if what == 'release' then -- token
  redis.call('DEL', KEYS[3])
  return {'done'}
end
local tags = tags_of(7) -- store: token, value, answer id, tenant, tags
redis.call('DEL', KEYS[3])
if called_off(tonumber(ARGV[3]), ARGV[6], tags, ARGV[5]) then return {'called_off'} end
local list = #tags > 0 and cjson.encode(tags) or '[]'
redis.call('HSET', KEYS[3], 'v', ARGV[4], 'i', ARGV[5], 'g', list, 's', ARGV[3], 't', ARGV[6])
redis.call('PEXPIRE', KEYS[3], keep_ms)
return {'done'}
