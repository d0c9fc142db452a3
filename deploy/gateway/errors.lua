-- The one form of errors that the gateway gives in Lua; errors.conf has it for nginx's own.
local cjson = require "cjson.safe"

local errors = {}

-- The body of the error whose status ngx.status has. `message` goes over the status's own.
function errors.body(message)
    message = message or ngx.var.error_message
    if ngx.var.protocol ~= "" then -- an open protocol knows nothing but this
        return cjson.encode { error = ngx.var.error_type .. ": " .. message }
    end
    return cjson.encode {
        status = "error",
        code = ngx.status,
        type = ngx.var.error_type,
        message = message,
    }
end

return errors
